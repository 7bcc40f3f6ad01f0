"""Code shared by several tests."""
