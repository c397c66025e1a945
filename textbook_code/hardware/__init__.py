"""What the machine does: bytes and, later, time.

Book: attention-variants
"""
