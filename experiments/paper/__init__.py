"""The claims of Kawaguchi and Sun (AAAI 2021) on real data: cells, their runner, the pages made of them."""
