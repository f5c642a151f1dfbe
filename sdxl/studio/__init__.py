"""The studio: a page on this machine on which someone without a command line makes a fine-tune and draws with it.

Knows people's projects on disk, the page, and how the entry points are called as processes; does not know how pictures are
prepared, how a training works, or how pictures are drawn. Nothing in the product imports it, and only the page imports Gradio.
"""
