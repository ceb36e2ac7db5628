"""Train contrastive models at any batch size: exact gradient caching on Accelerate and Transformers."""
