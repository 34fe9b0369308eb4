"""Put together and run: the Serve app, the controller, the CLI; nobody imports this package."""
