"""Federation: the node's round as a Flower ClientApp; a train message goes in, float32 factors and metrics come out."""
