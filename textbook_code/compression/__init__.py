"""Smaller models: numbers of fewer bits.

Book: part-embedded
"""
