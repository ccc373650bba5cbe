"""Measure for users: exactness and acceptance of heads."""
