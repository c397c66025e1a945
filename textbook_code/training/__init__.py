"""Objectives and loops; models come in as arguments.

Book: bert-mlm
"""
