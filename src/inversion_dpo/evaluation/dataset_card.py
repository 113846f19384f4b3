"""stub"""
def write_card(folder, config, shards): pass
