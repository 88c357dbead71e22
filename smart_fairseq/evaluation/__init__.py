"""What a fine-tuned model does beyond its accuracy; `full.evaluate_model` gives all of it."""
