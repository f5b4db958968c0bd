"""Federation: a round as a Flower ClientApp; a train message enters, an increment leaves."""
