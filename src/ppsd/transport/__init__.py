"""Bytes between ranks: shared memory, torch.distributed, and an in-process twin."""
