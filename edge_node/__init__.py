"""The edge node: requests and feedback go in; answers, and updates that carry no raw text, come out."""

__version__ = "0.1.0"
