from calsmooth.cli.app import main

main()
