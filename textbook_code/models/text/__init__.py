"""Text transformers.

Book: learning-path
"""
