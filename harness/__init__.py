"""What loop.py stands on: a room a file. Imports run in one direction, and nothing here imports loop.py.

    contract          what a fork changes; what the judge says of itself and of a run
    screen            messages, the live line, durations
    files             read without a hang, written whole, locked
    processes         children: started with a mark, watched, ended for certain
    repository        git
    environment       the machine: variables that a child gets, the installed packages, disk, data, devices
    ledger            rows, noise, the decision: pure functions
    store             one tag's folder: ledger, attempts, run folders, timeline
    desk              a checkout that one agent edits, and the gate that its edit must pass
    bench             one run on this machine: measure(Job) -> Measurement, Crash or Unavailable
    fleet             where jobs run: submit(Job) -> Future
    prompt            what an agent is told
    agents            how each coding agent's CLI is called; random_search is the one without a model
    report, page      status, report and audit as text; the picture
    commands          arguments and exit codes
"""
