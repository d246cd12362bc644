"""What `dask serve demo` deploys: a digit classifier, and small examples beside it."""
