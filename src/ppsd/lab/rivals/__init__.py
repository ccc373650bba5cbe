"""Rival ways to draft with a model's own layers, on our kernels, caches and stages.

DEL (arXiv 2504.05598) chooses exit and draft length anew each round, KNN-SSD (arXiv 2505.16162)
leaves out layers that suit the prompt. Both verify all drafts in one pass and draft nothing while
it runs, so on a pipeline one stage works at a time (chain.py). The product knows nothing of them.
"""
