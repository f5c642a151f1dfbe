"""Everything that is CUDA, Triton or compiling: graphs, fused kernels, compiled blocks, fp8.

Knows modules, tensors and GPUs; does not know recipes or requests. On a CPU nothing here changes anything.
"""
