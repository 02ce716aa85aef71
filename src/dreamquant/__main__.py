from dreamquant.cli import main

main()
