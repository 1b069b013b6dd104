"""Reading and writing files and folders so that nothing is lost and nothing foreign is believed."""
