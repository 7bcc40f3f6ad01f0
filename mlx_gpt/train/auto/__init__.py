"""What is picked when nothing is given."""
