"""Stage workers and the protocol they speak."""
