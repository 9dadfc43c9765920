"""Read and write files and text from elsewhere safely."""
