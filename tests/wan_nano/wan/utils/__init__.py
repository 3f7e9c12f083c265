"""What generate.py needs beside the pipelines."""
