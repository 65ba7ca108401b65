"""What both MDPs share: a batched process and its Gymnasium faces."""
