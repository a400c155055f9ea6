package deadletter

// ReplayID is the id of a letter's replay.
var ReplayID = replayID
