"""What a user measures: exactness, and the acceptance of heads."""
