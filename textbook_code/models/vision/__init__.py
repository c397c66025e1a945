"""Models that look at images, each in one file with the published names of its weights.

Book: part-embedded
"""
