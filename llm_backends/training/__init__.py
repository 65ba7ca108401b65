"""What training asks of a model: adapters, one pass over given responses, the output layer."""
