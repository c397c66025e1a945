"""How the weights are moved: optimizers, groups of parameters, and schedules of the learning rate.

Book: optimization
"""
