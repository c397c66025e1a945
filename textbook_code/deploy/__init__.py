"""From a trained model to the place where it runs: ONNX, TFLite, C, a microcontroller, the browser.

Book: part-embedded
"""
