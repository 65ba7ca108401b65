"""Language understanding: GLUE and SuperGLUE, their prompts, data and metrics."""
