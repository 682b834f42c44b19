"""The console: pages about usage and costs that the server renders. They work without JavaScript, and have none."""
