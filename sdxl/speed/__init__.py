"""All CUDA, Triton and compiler code: graphs, fused kernels, compiled blocks, fp8.

Knows modules, tensors and GPUs; does not know recipes or requests. On a CPU it changes nothing.
"""
