"""Drawing and training on many GPUs with Ray: an optional extra with requirements of its own.

Knows Ray and HTTP; does not know how pictures are drawn, or how a training works. The product never imports it.
"""
