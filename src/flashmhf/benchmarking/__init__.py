"""Time and memory of the operator, of layers and of models, next to what they replace.

Variants take turns, A B A B, on random inputs and are compared by medians within one run, because the speed of a
machine drifts. Memory is that of activations: the allocator's peak above what was allocated before, without the
gradients of parameters, which every layer has to return. Results are rows: dicts with units in their keys.
"""
