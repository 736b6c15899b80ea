"""What happens to the data: sources, training, embedding, the Lance table, publishing, SQL."""
