"""Prompt-feature attention: plain reference, fused Triton kernels, and the one op that chooses between them.

Nothing is imported here. Libraries that look for the hub package of the same name import this one, and so
does everything that only wants `kernels.reference`; Triton is loaded by `kernels.launch`, when a kernel runs.
"""
