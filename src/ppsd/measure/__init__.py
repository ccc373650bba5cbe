"""What a user measures: exactness, acceptance of heads, and times of this machine."""
