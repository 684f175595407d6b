"""Activations that autograd saves for the backward pass, held in 2, 4 or 8 bits a value."""
