"""From logits to text; models come in as arguments.

Book: generation
"""
