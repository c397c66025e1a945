"""How the weights are moved: schedules of the learning rate.

Book: gpt-training
"""
