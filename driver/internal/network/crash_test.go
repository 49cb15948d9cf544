package network

const killedAttach = "BIVOUAC_TEST_KILLED_ATTACH"

func attachAndDetachForEver(string) {}
