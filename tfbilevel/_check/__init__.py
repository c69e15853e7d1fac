"""Is this hypergradient right, and does TensorFlow have its derivatives?"""
