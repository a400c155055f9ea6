package reconciler

// Pages of the tests are a tenth of the real ones, see page in kit_test.go; so a tenth of the rows shows the same.
func init() {
	rowPage, maxCandidates, maxRereads = 50, 200, 50
	listenMost = 2 * listenPage // a backlog longer than one look is quick to make
}

// RealPages takes back what the tests have changed.
func RealPages() { rowPage, maxCandidates, maxRereads = 500, 2000, 200 }
