"""Servers for many GPUs, beside Cog's: an optional extra with requirements of its own.

Knows Ray Serve and HTTP; does not know how pictures are drawn. The product never imports it.
"""
