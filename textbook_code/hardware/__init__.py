"""What a computation takes of the machine: bytes.

Book: attention-variants
"""
