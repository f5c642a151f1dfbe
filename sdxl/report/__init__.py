"""The report of a training: one HTML page for people, and event files for TensorBoard.

Knows the record of a training, its pictures and its history; does not know how a training works, or who calls.
"""
