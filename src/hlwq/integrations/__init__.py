"""hlwq inside other libraries."""
