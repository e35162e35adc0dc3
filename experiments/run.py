"""What a Ray job runs: `kdbench run` with the same arguments, on the cluster that the job runs on.

ray job submit --working-dir . -- python experiments/run.py experiments/quickstart.yaml --results /shared/results

Results go to an absolute folder that all nodes see; one inside the job's copy of the working directory is refused, as Ray deletes it.
`kdbench submit` does all of this by itself.
"""

import os
import sys

from kdbench.cli.app import main

if __name__ == "__main__":
    # Ray sets the variable inside a job; an address among the arguments comes later, and wins.
    here = ["--set", "runtime.address=auto"] if "RAY_ADDRESS" in os.environ else []
    sys.argv = ["kdbench", "run", *here, *sys.argv[1:]]
    main()
