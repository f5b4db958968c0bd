"""The edge node: requests and feedback enter; answers and updates without raw text leave."""

__version__ = "0.1.0"
