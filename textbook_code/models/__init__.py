"""One model, one file: open it and see the whole forward pass.

Book: learning-path
"""
