"""Are the numbers right? Read in this order: ``source``, ``reference``, ``layers``; then ``verify``, which asks all."""
